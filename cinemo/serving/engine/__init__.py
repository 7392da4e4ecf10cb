"""What holds the model: jobs denoised together, step by step."""
