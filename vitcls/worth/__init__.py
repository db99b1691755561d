"""What published weights are worth on one's own images: classical, from scratch, probe and fine-tuned side by side."""
