"""How far the model is from what is known: exact arithmetic, published runs, and the fits that rest on them."""
