"""The guide: Markdown pages, and the Python that makes a site of them."""
