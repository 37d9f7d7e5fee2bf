"""What people look at: packed batches as the model gets them."""
