//! `dunlin run` against a daemon that plays a program: streams, signals, terminal, end.

mod fake;

use dunlin_proto::control::*;
use dunlin_proto::ids::Pid;
use fake::{Client, Fake, text};
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

fn out(bytes: &[u8]) -> Reply {
    Reply::Output {
        stream: 1,
        bytes: bytes.to_vec(),
    }
}

/// A program that writes back what it reads, until its input ends.
fn cat(client: &mut Client) -> ExitStatus {
    loop {
        match client.hear() {
            Some(RunInput::Stdin(bytes)) => {
                client.say(out(&bytes));
                let bytes = bytes.len() as u32;
                client.say(Reply::InputTaken { bytes });
            }
            Some(RunInput::StdinEnd) => return ExitStatus::Code(3),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn streams_and_exit_code_pass_through() {
    let fake = Fake::running(cat);
    let mut child = fake
        .command(&["run", "--", "cat"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let sent: Vec<u8> = (0..300_000u32).flat_map(u32::to_le_bytes).collect();
    let copy = sent.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&copy).unwrap());
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    assert!(output.stdout == sent);
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(3), String::new()));
}

#[test]
fn the_program_gets_the_callers_surroundings() {
    let seen = Arc::new(Mutex::new(None));
    let saw = Arc::clone(&seen);
    let fake = Fake::new(move |request, client| {
        let Request::Run(spec) = request else { panic!() };
        *saw.lock().unwrap() = Some(spec);
        client.say(Reply::Started { pid: Pid(193) });
    });
    let mut command = fake.command(&[
        "run", "-d", "--cwd", "bin", "--env", "A=2", "--env", "N=", "--", "prog", "-x", "--", "y",
    ]);
    let output = command
        .env("A", "1")
        .env("KEPT", "yes")
        .current_dir("/usr")
        .output()
        .unwrap();
    assert_eq!(text(&output.stdout), "193\n", "with -d the PID alone");
    let spec = seen.lock().unwrap().take().unwrap();
    assert_eq!(spec.argv, [&b"prog"[..], b"-x", b"--", b"y"]);
    assert_eq!(spec.cwd, b"/usr/bin");
    assert!(spec.detach && spec.tty.is_none());
    let value = |key: &str| -> Vec<String> {
        let all = spec.env.iter().map(|e| text(e));
        all.filter(|e| e.starts_with(&format!("{key}="))).collect()
    };
    assert_eq!(
        (value("A"), value("N"), value("KEPT")),
        (vec!["A=2".into()], vec!["N=".into()], vec!["KEPT=yes".into()])
    );
    assert_eq!(fake.dunlin(&["run", "--env", "=x", "--", "p"]).status.code(), Some(125));
}

#[test]
fn signals_reach_the_program_and_its_death_is_ours() {
    for signal in [2, 15, 1, 3, 10, 12] {
        let fake = Fake::running(|client| {
            client.say(out(b"on"));
            match client.hear_more() {
                Some(RunInput::Signal(signal)) => ExitStatus::Signal { signal, core: false },
                other => panic!("{other:?}"),
            }
        });
        let mut child = fake.command(&["run", "x"]).spawn().unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0; 2]).unwrap();
        send(signal, child.id());
        let output = child.wait_with_output().unwrap();
        assert_eq!(
            (output.status.signal(), text(&output.stderr)),
            (Some(signal), String::new())
        );
    }
}

#[test]
fn no_more_input_is_under_way_than_the_daemon_takes_in() {
    let fake = Fake::running(|client| {
        let mut received = 0;
        let mut take = |client: &mut Client, until: u64| {
            while received < until {
                match client.hear() {
                    Some(RunInput::Stdin(bytes)) => received += bytes.len() as u64,
                    other => panic!("{other:?} after {received} bytes"),
                }
            }
            assert_eq!(received, until);
        };
        take(client, INPUT_WINDOW_BYTES);
        client.say(Reply::InputTaken { bytes: 1000 });
        take(client, INPUT_WINDOW_BYTES + 1000);
        // The program reads no more, yet a signal comes through.
        client.say(out(b"full"));
        match client.hear() {
            Some(RunInput::Signal(signal)) => ExitStatus::Signal { signal, core: false },
            other => panic!("{other:?}"),
        }
    });
    let mut child = fake.command(&["run", "x"]).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let writer = std::thread::spawn(move || while stdin.write_all(&[0; 1 << 16]).is_ok() {});
    child.stdout.as_mut().unwrap().read_exact(&mut [0; 4]).unwrap();
    send(15, child.id());
    assert_eq!(child.wait_with_output().unwrap().status.signal(), Some(15));
    writer.join().unwrap();
}

#[test]
fn a_closed_output_is_a_broken_pipe_to_the_program() {
    let fake = Fake::running(|client| {
        client.say(out(&[b'y'; 1000]));
        match client.hear_more() {
            Some(RunInput::Signal(signal)) => ExitStatus::Signal { signal, core: false },
            other => panic!("{other:?}"),
        }
    });
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = fake.command(&["run", "yes"]).stdout(writer).output().unwrap();
    assert_eq!(
        (output.status.signal(), text(&output.stderr)),
        (Some(13), String::new())
    );
}

#[test]
fn stopped_and_continued_together() {
    let fake = Fake::running(|client| {
        client.say(out(b"on"));
        assert_eq!(client.hear_more(), Some(RunInput::Signal(19)));
        client.say(out(b"stopped"));
        assert_eq!(client.hear_more(), Some(RunInput::Signal(18)));
        ExitStatus::Code(0)
    });
    let mut child = fake.command(&["run", "x"]).spawn().unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0; 2]).unwrap();
    send(20, child.id());
    let deadline = Instant::now() + Duration::from_secs(20);
    let state = || std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
    while !state().contains(") T ") {
        assert!(Instant::now() < deadline, "dunlin does not stop itself");
        std::thread::yield_now();
    }
    send(18, child.id());
    let output = child.wait_with_output().unwrap();
    assert_eq!(
        (output.status.code(), text(&output.stdout)),
        (Some(0), "stopped".into())
    );
}

#[test]
fn a_daemon_that_goes_away_in_mid_run_leaves_advice() {
    let fake = Fake::new(|_, client| client.say(Reply::Started { pid: Pid(129) }));
    let output = fake.dunlin(&["run", "x"]);
    assert_eq!(output.status.code(), Some(125));
    assert!(
        text(&output.stderr).contains("`dunlin wait 129`"),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn on_a_terminal_the_program_gets_one_and_ours_is_restored() {
    let seen = Arc::new(Mutex::new(None));
    let saw = Arc::clone(&seen);
    let fake = Fake::new(move |request, client| {
        let Request::Run(spec) = request else { panic!() };
        *saw.lock().unwrap() = spec.tty;
        client.say(Reply::Started { pid: Pid(129) });
        client.say(out(b"ready\r\n"));
        // Raw: what is typed comes as it is, ^C is a byte and no signal.
        match client.hear() {
            Some(RunInput::Stdin(bytes)) if bytes == [3] => client.say(out(b"raw\r\n")),
            other => client.say(out(format!("{other:?}").as_bytes())),
        }
        client.say(Reply::Exited(ExitStatus::Code(5)));
    });
    let dunlin = env!("CARGO_BIN_EXE_dunlin");
    let inside = format!(
        "stty rows 33 cols 77; stty -g; {dunlin} --socket {} run vi; echo code $?; stty -g",
        fake.socket.display()
    );
    let mut terminal = Command::new("script");
    terminal
        .args(["-qec", &inside, "/dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut child = terminal.spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut said = String::new();
    let mut read_until = |said: &mut String, what: &str| {
        while !said.contains(what) {
            let mut buffer = [0; 512];
            let n = stdout.read(&mut buffer).unwrap();
            assert!(n > 0, "the terminal closed after {said:?}");
            said.push_str(&text(&buffer[..n]));
        }
    };
    read_until(&mut said, "ready");
    child.stdin.as_mut().unwrap().write_all(&[3]).unwrap();
    read_until(&mut said, "code 5");
    drop(child.stdin.take());
    let mut rest = Vec::new();
    stdout.read_to_end(&mut rest).unwrap();
    child.wait().unwrap();
    said.push_str(&text(&rest));
    assert_eq!(*seen.lock().unwrap(), Some(WindowSize { rows: 33, cols: 77 }), "{said}");
    assert!(said.contains("raw\r\n"), "{said}");
    let settings: Vec<&str> = said
        .lines()
        .map(str::trim)
        .filter(|l| l.matches(':').count() > 20)
        .collect();
    assert_eq!(settings.len(), 2, "{said}");
    assert_eq!(settings[0], settings[1], "the terminal is as it was");
}

#[test]
fn a_move_shows_its_progress_on_a_terminal() {
    let fake = Fake::new(|_, client| {
        let phase = MovePhase::Drain;
        let progress = MoveProgress {
            pid: Pid(129),
            phase,
            pages_left: 5,
            pages_total: 10,
            bytes_per_second: 1 << 20,
        };
        client.say(Reply::Progress(progress));
        client.say(Reply::Refused(vec![]));
    });
    for (no_color, coloured) in [("", true), ("1", false)] {
        let inside = format!(
            "{} --socket {} move 129 n2",
            env!("CARGO_BIN_EXE_dunlin"),
            fake.socket.display()
        );
        let mut terminal = Command::new("script");
        terminal
            .args(["-qec", &inside, "/dev/null"])
            .env("NO_COLOR", no_color)
            .env("TERM", "xterm");
        let said = text(&terminal.stdin(Stdio::null()).output().unwrap().stdout);
        assert!(said.contains("5 of 10 pages left  1.0M/s"), "{said:?}");
        assert_eq!(said.contains("\u{1b}[36m"), coloured, "{said:?}");
    }
}

fn send(signal: i32, pid: u32) {
    let sent = Command::new("kill")
        .args([format!("-{signal}"), pid.to_string()])
        .status()
        .unwrap();
    assert!(sent.success());
}
