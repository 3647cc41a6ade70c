"""`ExactTrainer`: the Trainer of transformers with exact gradient accumulation."""
