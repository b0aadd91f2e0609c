"""Visual-token reduction: pieces, and the table of methods composed from them."""
