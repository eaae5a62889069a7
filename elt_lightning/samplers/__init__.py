"""How samples are drawn from a network that is called again and again. Imports torch alone; knows no module or trainer."""
