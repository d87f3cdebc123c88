"""Does this prompt concern this edit? Gates turn a prompt into a point; an edit owns the ball around its centre."""
