"""The item cache: single results, by the content of what decides them."""
