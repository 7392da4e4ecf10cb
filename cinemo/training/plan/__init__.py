"""What a training will take: FLOPs, memory, time and money, before it starts."""
