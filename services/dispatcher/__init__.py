"""The dispatcher: owns deliveries, attempts and suppressions; how messages leave, and what came of them."""
