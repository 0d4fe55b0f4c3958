"""What the other ranks are told, and how soon, when one rank fails."""
