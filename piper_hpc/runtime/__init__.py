"""What one rank needs from the machine below it: its place, its device, its process groups, its clock."""
