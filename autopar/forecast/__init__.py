"""What a forced plan of a decoder transformer takes, in seconds and bytes, by the costs that the search uses; and how near that is to published runs."""
