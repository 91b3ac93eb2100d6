"""What holds, what changed, who says so, and what may go: verify, diff, show, sign, retire."""
