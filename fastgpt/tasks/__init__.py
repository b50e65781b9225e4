"""What a trained model is used for, from text to text: one module for each task."""
