"""What a user calls beside the stages."""
