"""What a run is: typed sections (``schema``) and how a recipe becomes them (``load``)."""
