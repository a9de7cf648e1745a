"""What surrounds timing: cores, memory of a process, pictures, and whether two runs agree."""
