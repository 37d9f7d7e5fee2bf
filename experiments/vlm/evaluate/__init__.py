"""How good a trained model's answers are. metrics: what they score against those of people."""
