"""What both formats share, and what neither owns: folders, states, generation."""
