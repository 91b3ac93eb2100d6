"""The commands of `sdlora audit`: what holds, what changed, who says so."""
