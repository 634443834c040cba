"""The cellar: what the seven files at the top need and a reader skips. It imports none of them."""
