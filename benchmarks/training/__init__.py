"""Training: what a step costs, and which options of set-block training are best."""
