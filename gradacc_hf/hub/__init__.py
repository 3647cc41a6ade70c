"""Model cards and the Hugging Face Hub."""
