"""What a user sees of a compile: text, structured traces."""
