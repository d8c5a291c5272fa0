"""What each part of this project brings: switched on alone, and taken away from all of them."""
