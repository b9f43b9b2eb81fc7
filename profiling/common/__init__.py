"""What the commands share: timing, the machine's description, reports of parts, and set-ups of training steps."""
