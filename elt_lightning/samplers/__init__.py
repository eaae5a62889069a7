"""How samples are drawn by calling a network again and again. Imports torch alone; knows no module or trainer."""
