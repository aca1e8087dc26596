"""What tests share. No test file imports from another."""
