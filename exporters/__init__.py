"""From a cut model to graphs, engines and a bundle."""
