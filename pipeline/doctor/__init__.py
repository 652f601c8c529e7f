"""What a machine or an allocation can do, and what is wrong with it; ``examine`` tells the story."""
