"""The operator's commands: their arguments, what they ask the service, and how they show it."""
