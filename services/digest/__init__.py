"""Who is told what, when, and together with what. README.md says what it owns and guarantees."""
