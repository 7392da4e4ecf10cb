"""What of serving is durable: jobs, their files, API keys."""
