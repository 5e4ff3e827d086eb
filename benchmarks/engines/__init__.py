"""What serving engines themselves say of our files and plans: their parsers and planners, without a GPU."""
