//! Runs other programs with their output streamed, condensed to one progress line, or captured.

use std::collections::VecDeque;
use std::fmt::Display;
use std::io::{BufRead, BufReader, IsTerminal, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::interrupt;

/// Number of last lines that are printed of a failed command.
const TAIL: usize = 30;
/// Interval of progress lines of a long step without a terminal.
const HEARTBEAT: Duration = Duration::from_secs(10);

/// Prints the headline of a group of steps.
pub(crate) fn headline(text: impl Display) {
    println!("==> {text}");
}

/// Seconds since `start`, to be printed: `12.3 s`.
pub(crate) fn elapsed(start: Instant) -> String {
    format!("{:.1} s", start.elapsed().as_secs_f64())
}

/// Runs a command with its output passed through, such as a cargo build.
pub(crate) fn stream(command: &mut Command) -> Result<()> {
    flush();
    let name = display(command);
    let mut child = spawn(command)?;
    let attended = interrupt::attend(child.id());
    let status = child.wait().with_context(|| format!("cannot wait for `{name}`"))?;
    drop(attended);
    interrupt::check()?;
    succeeded(&name, status)
}

/// Runs a long command and condenses its output to one progress line with `label`. On failure, prints the last lines of its
/// output.
pub(crate) fn condense(label: &str, command: &mut Command) -> Result<()> {
    let ended = watch(label, command, TAIL)?;
    if !ended.status.success() {
        for text in ended.lines {
            eprintln!("  | {text}");
        }
    }
    succeeded(&display(command), ended.status)
}

/// How a command ended.
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    /// The last lines of its output.
    pub(crate) lines: VecDeque<String>,
}

/// As [`condense`], but a failure of the command is no error, and the last `count` lines are returned.
pub(crate) fn watch(label: &str, command: &mut Command, count: usize) -> Result<Ended> {
    let name = display(command);
    let start = Instant::now();
    let mut line = ProgressLine::new(label);
    line.show(start, "");
    let mut child = spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()))?;
    let attended = interrupt::attend(child.id());
    let (sender, lines) = mpsc::channel();
    send_lines(child.stdout.take(), sender.clone());
    send_lines(child.stderr.take(), sender);

    let mut tail = VecDeque::new();
    loop {
        match lines.recv_timeout(Duration::from_secs(1)) {
            Ok(text) => {
                if tail.len() == count {
                    tail.pop_front();
                }
                tail.push_back(text);
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        line.show(start, tail.back().map_or("", |text| text.trim()));
    }
    let status = child.wait().with_context(|| format!("cannot wait for `{name}`"))?;
    drop(attended);
    line.clear();
    interrupt::check()?;
    Ok(Ended { status, lines: tail })
}

/// Runs a short command and returns its standard output.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let name = display(command);
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start `{name}`"))?;
    interrupt::check()?;
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr);
        bail!("`{name}` failed ({}): {}", output.status, error.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Starts a command without input in its own process group, which the caller passes to [`interrupt::attend`].
pub(crate) fn spawn(command: &mut Command) -> Result<Child> {
    interrupt::check()?;
    let name = display(command);
    command.stdin(Stdio::null()).process_group(0);
    command.spawn().with_context(|| format!("cannot start `{name}`"))
}

/// The command line, without environment variables.
pub(crate) fn display(command: &Command) -> String {
    let program = std::path::Path::new(command.get_program());
    let program = program.file_name().unwrap_or(command.get_program());
    let words = std::iter::once(program).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Flushes standard output before a child writes to it.
pub(crate) fn flush() {
    // The next println reports a closed reader.
    let _ = std::io::stdout().flush();
}

fn succeeded(name: &str, status: ExitStatus) -> Result<()> {
    if !status.success() {
        bail!("`{name}` failed ({status})");
    }
    Ok(())
}

fn send_lines(stream: Option<impl Read + Send + 'static>, sender: Sender<String>) {
    let Some(stream) = stream else { return };
    thread::spawn(move || {
        for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
            // Without a receiver, xtask is exiting.
            let _ = sender.send(String::from_utf8_lossy(&line).trim_end().to_owned());
        }
    });
}

/// A line that is rewritten on a terminal, and printed at intervals elsewhere.
struct ProgressLine {
    label: String,
    terminal: bool,
    width: usize,
    last: Option<Instant>,
}

impl ProgressLine {
    fn new(label: &str) -> Self {
        let columns = std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
        let terminal = std::io::stdout().is_terminal();
        Self { label: label.to_owned(), terminal, width: columns.unwrap_or(80), last: None }
    }

    fn show(&mut self, start: Instant, text: &str) {
        let pause = if self.terminal { Duration::from_millis(100) } else { HEARTBEAT };
        if self.last.is_some_and(|last| last.elapsed() < pause) {
            return;
        }
        self.last = Some(Instant::now());
        let line = format!("  ...  {} ({} s) {text}", self.label, start.elapsed().as_secs());
        if self.terminal {
            let line: String = line.chars().take(self.width.saturating_sub(1)).collect();
            print!("\r\x1b[2K{line}");
        } else {
            println!("{}", line.trim_end());
        }
        flush();
    }

    fn clear(&self) {
        if self.terminal {
            print!("\r\x1b[2K");
            flush();
        }
    }
}
