"""Methods by which visual tokens leave inside the language model: scores, and the table that composes them."""
