"""Let what stays make up for what goes."""
