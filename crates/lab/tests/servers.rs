//! Real servers go round a lab while their clients on the outside host are at work, and every answer is right.

mod support;

use dunlin_lab::harness::Run;
use dunlin_lab::{Lab, Options};
use dunlin_proto::control::WindowSize;
use support::outside::{Outside, PYTHON, addresses, hears_more, nothing_was_broken};
use support::{JOURNEY, Workshop, program, spec_in};

/// A lab with a server on n1, which has said that it is ready.
#[track_caller]
fn serving(name: &str, ready: &str, argv: impl FnOnce(&Workshop) -> Vec<String>) -> (Lab, Workshop, Run) {
    let (lab, workshop) = (Lab::up(name, &Options::default()), Workshop::new(name));
    let argv = argv(&workshop);
    let words: Vec<&str> = argv.iter().map(String::as_str).collect();
    let run = lab.node("n1").run_as(spec_in(&workshop.path(""), &words));
    run.until_says(ready);
    (lab, workshop, run)
}

fn words(command: &str) -> Vec<String> {
    command.split(' ').map(str::to_owned).collect()
}

/// So many clients of a kind, of the program `clients.py`.
fn clients(lab: &Lab, kind: &str, port: &str, count: &str) -> Outside {
    let [address, _] = addresses(lab);
    let script = program("clients.py");
    Outside::start(lab, &[PYTHON, script.to_str().unwrap(), kind, &address, port, count])
}

/// Takes a server twice round and on, while its clients go on everywhere; they have found nothing wrong.
#[track_caller]
fn goes_round(lab: &Lab, server: &Run, mut clients: Outside) {
    hears_more(&mut clients);
    for node in JOURNEY {
        lab.move_process(server.pid, node);
        hears_more(&mut clients);
    }
    let said = clients.last_words();
    eprintln!("{said}");
    assert!(said.contains(" rounds right"), "{said}");
    nothing_was_broken(lab);
}

#[test]
fn redis_with_pipelines_and_a_subscriber() {
    let (lab, _workshop, server) = serving("srv-redis", "Ready to accept connections", |_| {
        let quiet = ["--save", "", "--appendonly", "no"].map(str::to_owned);
        let mut argv = words("/usr/bin/redis-server --port 6379 --bind 0.0.0.0 --protected-mode no");
        argv.extend(quiet);
        argv
    });
    let at_work = clients(&lab, "redis", "6379", "4");
    goes_round(&lab, &server, at_work);
}

#[test]
fn an_event_loop_of_python() {
    let (lab, _workshop, server) = serving("srv-asyncio", "ready", |_| {
        vec![
            PYTHON.into(),
            program("swapcase.py").display().to_string(),
            "9001".into(),
        ]
    });
    let at_work = clients(&lab, "lines", "9001", "12");
    goes_round(&lab, &server, at_work);
}

#[test]
fn an_event_loop_at_whose_door_there_is_always_somebody() {
    let (lab, _workshop, server) = serving("srv-knock", "ready", |_| {
        vec![
            PYTHON.into(),
            program("swapcase.py").display().to_string(),
            "9001".into(),
        ]
    });
    let at_work = clients(&lab, "knock", "9001", "12");
    goes_round(&lab, &server, at_work);
}

#[test]
fn a_web_server_in_go_with_connections_that_come_and_go() {
    let (lab, _workshop, server) = serving("srv-go", "ready", |workshop| {
        vec![workshop.compile("digests.go").display().to_string(), "9002".into()]
    });
    let at_work = clients(&lab, "post", "9002", "8");
    goes_round(&lab, &server, at_work);
}

/// A master and two workers, with files to serve.
fn nginx(workshop: &Workshop) -> Vec<String> {
    let dir = workshop.path("");
    let dir = dir.to_str().unwrap().trim_end_matches('/');
    let kinds = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"];
    let spools: String = kinds
        .iter()
        .map(|kind| format!("{kind}_temp_path {dir}/{kind}; "))
        .collect();
    let configuration = format!(
        "daemon off; worker_processes 2; pid {dir}/pid; error_log {dir}/errors info;\n\
         events {{ worker_connections 256; }}\n\
         http {{ access_log off; keepalive_requests 100000000; sendfile on; {spools}\n\
         server {{ listen 8080; listen [::]:8080; root {dir}/www; }} }}\n"
    );
    let configuration = workshop.file("nginx.conf", &configuration);
    let www = workshop.subdir("www");
    let make = "import hashlib, random, sys\n\
                big = random.Random(1).randbytes(20 << 20)\n\
                open(sys.argv[1] + '/big', 'wb').write(big)\n\
                open(sys.argv[1] + '/digest', 'w').write(hashlib.sha256(big).hexdigest())\n\
                open(sys.argv[1] + '/page', 'w').write('some text\\n' * 100)";
    let made = std::process::Command::new(PYTHON).args(["-c", make]).arg(&www).status();
    assert!(made.expect("Python").success());
    let path = configuration.to_str().unwrap();
    let argv = ["/usr/sbin/nginx", "-c", path, "-p", dir, "-e", &format!("{dir}/errors")];
    argv.map(str::to_owned).to_vec()
}

#[test]
fn nginx_with_its_workers_keeps_connections_and_downloads() {
    const SECONDS: &str = "8";
    let (lab, workshop) = (Lab::up("srv-nginx", &Options::default()), Workshop::new("srv-nginx"));
    let argv = nginx(&workshop);
    let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
    let server = lab.node("n1").run_as(spec_in(&workshop.path(""), &argv));
    lab.until("both workers", |rows| {
        rows.iter().filter(|row| row.ppid == server.pid).count() == 2
    });
    let mut downloads = clients(&lab, "fetch", "8080", "2");
    hears_more(&mut downloads);
    let [address, _] = addresses(&lab);
    let url = format!("http://{address}:8080/page");
    std::thread::scope(|scope| {
        let words = ["wrk", "-t", "1", "-c", "40", "-d", SECONDS, "--timeout", "10s", &url];
        let lab = &lab;
        let wrk = scope.spawn(move || {
            let output = lab.node("client").exec(&words);
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
        });
        let mut moves = 0;
        for node in ["n2", "n3", "n1"].into_iter().cycle() {
            if wrk.is_finished() {
                break;
            }
            lab.move_tree(server.pid, node);
            moves += 1;
        }
        let said = wrk.join().unwrap();
        eprintln!("{moves} moves: {said}");
        assert!(said.contains("Requests/sec"), "{said}");
        assert!(!said.contains("Socket errors") && !said.contains("Non-2xx"), "{said}");
        assert!(moves >= support::LEAST_MOVES, "only {moves} moves");
    });
    hears_more(&mut downloads);
    let said = downloads.last_words();
    let errors = std::fs::read_to_string(workshop.path("errors")).unwrap_or_default();
    assert!(said.contains(" rounds right"), "{said}; nginx says:\n{errors}");
}

#[test]
fn socat_between_a_terminal_and_a_connection() {
    let (lab, workshop) = (Lab::up("srv-tty", &Options::default()), Workshop::new("srv-tty"));
    let argv = ["/usr/bin/socat", "-,echo=0", "TCP4-LISTEN:9003,reuseaddr"];
    let mut spec = spec_in(&workshop.path(""), &argv);
    spec.tty = Some(WindowSize { rows: 24, cols: 80 });
    let mut terminal = lab.node("n1").run_as(spec);
    let [address, _] = addresses(&lab);
    // It listens when the first connection is taken.
    let to = format!("TCP4:{address}:9003,retry=100,interval=0.05");
    let mut outside = Outside::start(&lab, &["/usr/bin/socat", "-", &to]);
    outside.say("hello");
    terminal.until_says("hello");
    for (n, node) in JOURNEY.into_iter().enumerate() {
        lab.move_process(terminal.pid, node);
        outside.say(&format!("line {n} for the terminal"));
        terminal.until_says(&format!("line {n} for the terminal"));
        terminal.type_in(&format!("line {n} for the outside\n"));
        assert_eq!(outside.line(), format!("line {n} for the outside"));
    }
    nothing_was_broken(&lab);
}
