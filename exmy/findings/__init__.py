"""The page of findings: what the paper said, what came of it in the committed studies, and its figures: `make figures`."""
