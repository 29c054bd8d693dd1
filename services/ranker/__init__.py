"""The ranker: orders retrieved candidates by weighted features, and spreads them."""
