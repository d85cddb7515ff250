"""The cache inside other libraries. Each module here needs its library; nothing below does."""
