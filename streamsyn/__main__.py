from streamsyn.cli.main import main

main()
