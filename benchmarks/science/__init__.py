"""Experiments on truncation: every figure and table of docs/science.md, by one command.

experiments  what there is: the parts of each, how a part is run, its picture
characters   random truncation against the regular one, on text
oracle       each truncation against the gradient by forward mode
ppo          recurrent PPO by the length of backpropagation
records      how tables and pictures read the records
tables       the tables, made of records
pictures     the pictures of those that are no example
__main__     runs what is missing in the results, and writes them
"""
