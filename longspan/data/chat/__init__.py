"""Tasks with answers that a rule can check, as conversations; right and wrong answers to them."""
