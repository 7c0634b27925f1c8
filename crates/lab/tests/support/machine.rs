//! A machine with a kernel of its own, emulated by qemu, and its serial console.
//!
//! Owns the emulator and the root file system that it unpacks into memory: what `scripts/kernel-image` has made, and files of
//! this machine. Refuses to know dunlin. Invariants: the emulator ends with the value; a command that does not
//! end in time fails the test with what was said until then.

use super::Workshop;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// Emulated, and on a busy machine: a boot has been seen to take more than a minute.
const PATIENCE: Duration = Duration::from_secs(200);

/// After so long it is reminded.
const SILENCE: Duration = Duration::from_millis(500);

/// One of the two machines of a pair, 1 or 2.
pub struct Machine {
    number: u32,
    emulator: Child,
    console: ChildStdin,
    heard: Receiver<Vec<u8>>,
    commands: u32,
}

/// What a command on a machine came to.
#[derive(Debug)]
pub struct Done {
    /// Its exit code.
    pub code: i32,
    /// What it has said on both streams.
    pub said: String,
}

/// The kernel, and the root file system with these files in `/usr/bin`, with the libraries that they are linked to.
#[track_caller]
pub fn image(workshop: &Workshop, files: &[PathBuf]) -> (PathBuf, PathBuf) {
    let from = std::env::var_os("DUNLIN_KERNEL_IMAGE").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/kernel"),
        PathBuf::from,
    );
    let (kernel, base) = (from.join("vmlinuz"), from.join("base.cpio"));
    assert!(
        kernel.exists() && base.exists(),
        "there is no kernel in {}\nhint: scripts/kernel-image target/kernel",
        from.display()
    );
    let root = workshop.subdir("root");
    let bin = workshop.subdir("root/usr/bin");
    let mut libraries = BTreeSet::new();
    for file in files {
        std::fs::copy(file, bin.join(file.file_name().expect("a file"))).expect("a copy");
        libraries.extend(libraries_of(file));
    }
    for library in libraries {
        let to = root.join("usr").join(
            library
                .strip_prefix("/usr")
                .unwrap_or(&library)
                .strip_prefix("/")
                .unwrap_or(&library),
        );
        std::fs::create_dir_all(to.parent().expect("below the root")).expect("its directory");
        std::fs::copy(&library, to).expect("a copy");
    }
    let whole = workshop.path("initrd");
    let pack = format!(
        "cat {base} > {whole} && cd {root} && find . | cpio -o -H newc --quiet >> {whole}",
        base = base.display(),
        whole = whole.display(),
        root = root.display()
    );
    let packed = Command::new("sh").args(["-ec", &pack]).status().expect("sh");
    assert!(packed.success(), "the root file system was not packed");
    (kernel, whole)
}

fn libraries_of(file: &Path) -> Vec<PathBuf> {
    let said = Command::new("ldd").arg(file).output().expect("ldd").stdout;
    let said = String::from_utf8_lossy(&said).into_owned();
    let words = said.split_whitespace().filter(|word| word.starts_with('/'));
    words.map(PathBuf::from).collect()
}

impl Machine {
    /// Starts one, which is not [up](Machine::is_up) yet. Its first interface leads to the other machine's first, its second to the other's second.
    #[track_caller]
    pub fn start(workshop: &Workshop, image: &(PathBuf, PathBuf), number: u32) -> Machine {
        let path = |name: String| workshop.path(&name).display().to_string();
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "1", "-m", "1200"]);
        command.args(["-nodefaults", "-no-reboot", "-display", "none"]);
        command.arg("-kernel").arg(&image.0).arg("-initrd").arg(&image.1);
        command.args([
            "-append",
            &format!("console=ttyS0 quiet panic=-1 mitigations=off machine={number}"),
        ]);
        for link in 0..2 {
            let (own, other) = (
                path(format!("link{link}.{number}")),
                path(format!("link{link}.{}", 3 - number)),
            );
            command.args([
                "-netdev",
                &format!("dgram,id=n{link},local.type=unix,local.path={own},remote.type=unix,remote.path={other}"),
                "-device",
                &format!("virtio-net-pci,netdev=n{link},mac=52:54:00:00:0{link}:0{number}"),
            ]);
        }
        command.args(["-serial", "stdio"]);
        let log = File::create(workshop.path(&format!("emulator.{number}"))).expect("a log");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
        let mut emulator = command
            .spawn()
            .expect("qemu-system-x86_64\nhint: scripts/prepare installs it");
        let console = emulator.stdin.take().expect("piped");
        let mut output = emulator.stdout.take().expect("piped");
        let (tell, heard) = channel();
        // Ends with the emulator.
        std::thread::spawn(move || {
            let mut piece = [0; 4096];
            while let Ok(length @ 1..) = output.read(&mut piece) {
                if tell.send(piece[..length].to_vec()).is_err() {
                    return;
                }
            }
        });
        Machine {
            number,
            emulator,
            console,
            heard,
            commands: 0,
        }
    }

    /// Waits until its shell obeys, which it says: what it is told earlier goes lost.
    #[track_caller]
    pub fn is_up(&mut self) {
        self.hear("its boot", |text| text.contains("obeying").then_some(()));
    }

    /// Waits until what it says is enough.
    #[track_caller]
    fn hear<T>(&mut self, at: &str, enough: impl Fn(&str) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        let mut said = Vec::new();
        loop {
            let text = String::from_utf8_lossy(&said).replace('\r', "");
            if let Some(found) = enough(&text) {
                return found;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match self.heard.recv_timeout(left.min(SILENCE)) {
                Ok(more) => said.extend(more),
                // What an emulated UART has to say can wait for the next thing that it hears.
                Err(RecvTimeoutError::Timeout) if !left.is_zero() => drop(writeln!(self.console)),
                Err(why) => panic!("machine {}, at {at}: {why}: {text}", self.number),
            }
        }
    }

    /// Has its shell do this.
    #[track_caller]
    pub fn does(&mut self, command: &str) -> Done {
        self.commands += 1;
        let mark = format!("end-of-{}:", self.commands);
        // Not as it will be said: a console may echo.
        let line = format!(
            "{{ {command}\n}} </dev/null 2>&1; echo 'end-of'\"-{}:$?.\"",
            self.commands
        );
        if writeln!(self.console, "{line}").is_err() {
            self.hear(command, |_| None::<()>);
        }
        self.hear(command, |text| {
            let (before, after) = text.split_once(&mark)?;
            let (code, _) = after.split_once('.')?;
            Some(Done {
                code: code.parse().expect("an exit code"),
                said: before.to_owned(),
            })
        })
    }

    /// Has its shell do what must succeed; what was said.
    #[track_caller]
    pub fn must(&mut self, command: &str) -> String {
        let done = self.does(command);
        assert_eq!(done.code, 0, "machine {}: {command}: {}", self.number, done.said);
        done.said
    }

    /// Has its shell try this until it succeeds; what was said then.
    #[track_caller]
    pub fn until(&mut self, command: &str) -> String {
        let started = Instant::now();
        loop {
            let done = self.does(command);
            if done.code == 0 {
                return done.said;
            }
            assert!(
                started.elapsed() < PATIENCE,
                "machine {} waits for {command}: {}",
                self.number,
                done.said
            );
        }
    }

    /// Has a file written there.
    #[track_caller]
    pub fn write(&mut self, path: &str, contents: &str) {
        self.must(&format!("cat > {path} <<'END-OF-FILE'\n{contents}\nEND-OF-FILE"));
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.emulator.kill();
        let _ = self.emulator.wait();
    }
}
