"""The dispatcher: owns deliveries, attempts and suppressions; decides how a message leaves, and tells what came of it."""
