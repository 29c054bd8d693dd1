"""Loading files of any size into a collection, with progress, and on from where a load was stopped."""
