"""Image similarity, re-identification and confidence intervals."""
