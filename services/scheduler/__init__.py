"""The scheduler: owns timers, recurrences, timelines and facts; decides when, and whether. DESIGN §5."""
