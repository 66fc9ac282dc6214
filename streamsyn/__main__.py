from streamsyn.cli import main

main()
