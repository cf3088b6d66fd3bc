//! Tests of the management of `resolv.conf`.

use std::os::unix::fs::symlink;

use tempfile::TempDir;

use super::*;

const BEFORE: &str =
    "# by hand\nnameserver 192.0.2.1\nnameserver 192.0.2.2\nsearch example.com\noptions ndots:1 timeout:3\n";

fn content() -> Content {
    Content {
        nameserver: "10.244.1.1".parse().unwrap(),
        search: vec!["svc.overlay".to_owned(), "overlay".to_owned()],
    }
}

fn directory_with(text: &str) -> (TempDir, PathBuf) {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("resolv.conf");
    fs::write(&path, text).unwrap();
    (directory, path)
}

fn names(directory: &TempDir) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn the_file_is_written_and_the_original_comes_back() {
    let (directory, path) = directory_with(BEFORE);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    let file = ResolvConf::at(&path).unwrap();
    assert!(file.install(&content()).unwrap());
    let text = fs::read_to_string(&path).unwrap();
    let (first, body) = text.split_once('\n').unwrap();
    assert!(first.starts_with(MARKER));
    assert_eq!(
        body,
        "nameserver 10.244.1.1\nsearch svc.overlay overlay example.com\noptions ndots:2\noptions timeout:3\n"
    );
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o640);
    assert!(!file.install(&content()).unwrap(), "the second time there is nothing to do");
    let other = Content { nameserver: "10.244.1.9".parse().unwrap(), ..content() };
    assert!(file.install(&other).unwrap());
    assert!(file.restore().unwrap());
    assert_eq!(fs::read_to_string(&path).unwrap(), BEFORE);
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o640);
    assert_eq!(names(&directory), ["resolv.conf"]);
    assert!(!file.restore().unwrap());
}

#[test]
fn what_a_killed_agent_left_is_restored_by_the_next() {
    let (_directory, path) = directory_with(BEFORE);
    ResolvConf::at(&path).unwrap().install(&content()).unwrap();
    assert!(ResolvConf::at(&path).unwrap().restore().unwrap());
    assert_eq!(fs::read_to_string(&path).unwrap(), BEFORE);
    // Killed after the original was kept, and before the file was written.
    let file = ResolvConf::at(&path).unwrap();
    file.keep(Original::File(BEFORE.as_bytes().to_vec())).unwrap();
    assert!(file.restore().unwrap());
    file.keep(Original::File(BEFORE.as_bytes().to_vec())).unwrap();
    assert!(file.install(&content()).unwrap());
    assert!(file.restore().unwrap());
    assert_eq!(fs::read_to_string(&path).unwrap(), BEFORE);
}

#[test]
fn a_file_that_others_have_changed_is_not_touched() {
    let (directory, path) = directory_with(BEFORE);
    let file = ResolvConf::at(&path).unwrap();
    file.install(&content()).unwrap();
    let ours = fs::read_to_string(&path).unwrap();
    for changed in [format!("{ours}nameserver 192.0.2.3\n"), "nameserver 192.0.2.3\n".to_owned()] {
        fs::write(&path, &changed).unwrap();
        for error in [file.restore().unwrap_err(), file.install(&content()).unwrap_err()] {
            assert!(error.to_string().contains("another program has changed"), "{error}");
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), changed);
        assert_eq!(names(&directory).len(), 2, "the original stays");
    }
    fs::remove_file(&path).unwrap();
    assert!(file.restore().is_err());
    fs::write(&path, &ours).unwrap();
    fs::remove_file(&file.backup).unwrap();
    for error in [file.restore().unwrap_err(), file.install(&content()).unwrap_err()] {
        assert!(error.to_string().contains("no longer in"), "{error}");
    }
}

#[test]
fn a_file_that_did_not_exist_is_removed_again() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("resolv.conf");
    let file = ResolvConf::at(&path).unwrap();
    assert!(file.install(&content()).unwrap());
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, MODE);
    assert_eq!(file.upstreams(&[]).unwrap(), []);
    assert!(file.restore().unwrap());
    assert!(names(&directory).is_empty());
}

#[test]
fn symbolic_links_stay() {
    let (directory, target) = directory_with(BEFORE);
    let links = TempDir::new().unwrap();
    let (first, second) = (links.path().join("first"), links.path().join("second"));
    symlink(&target, &first).unwrap();
    symlink("first", &second).unwrap();
    let file = ResolvConf::at(&second).unwrap();
    file.install(&content()).unwrap();
    assert!(fs::read_to_string(&target).unwrap().starts_with(MARKER));
    assert_eq!(names(&directory).len(), 2, "the original is beside the file, not beside the link");
    assert_eq!(names(&links).len(), 2);
    file.restore().unwrap();
    assert_eq!(fs::read_link(&second).unwrap(), Path::new("first"));
    assert_eq!(fs::read_to_string(&target).unwrap(), BEFORE);
    let circle = links.path().join("circle");
    symlink("circle", &circle).unwrap();
    assert!(ResolvConf::at(&circle).is_err());
}

#[test]
fn upstreams_are_those_of_the_original_without_the_own_address() {
    let text = "nameserver 192.0.2.1 # first\nnameserver 10.244.1.1\n nameserver 192.0.2.9\nnameserver\nnameserver x\n\
                nameserver fe80::1%7\nnameserver 192.0.2.4\n";
    let (_directory, path) = directory_with(text);
    let file = ResolvConf::at(&path).unwrap();
    let own = ["10.244.1.1:53".parse().unwrap()];
    let expected: Vec<SocketAddr> = vec!["192.0.2.1:53".parse().unwrap(), "[fe80::1%7]:53".parse().unwrap()];
    assert_eq!(file.upstreams(&own).unwrap(), expected);
    file.install(&content()).unwrap();
    assert_eq!(file.upstreams(&own).unwrap(), expected);
}

#[test]
fn options_of_the_original_stay_and_the_last_search_list_counts() {
    let text = content().text(
        "domain a.example\nsearch b.example OVERLAY c.example\noptions rotate ndots:5\nsortlist 10.0.0.0\n",
    );
    let body = text.split_once('\n').unwrap().1;
    assert_eq!(
        body,
        "nameserver 10.244.1.1\nsearch svc.overlay overlay b.example c.example\noptions ndots:2\noptions rotate ndots:5\n\
         sortlist 10.0.0.0\n"
    );
}

#[test]
fn a_foreign_file_in_the_place_of_the_original_is_not_taken_for_it() {
    let (_directory, path) = directory_with(BEFORE);
    let file = ResolvConf::at(&path).unwrap();
    fs::write(&file.backup, "something else").unwrap();
    assert!(file.install(&content()).unwrap_err().to_string().contains("is not the agent's"));
    assert_eq!(fs::read_to_string(&path).unwrap(), BEFORE);
}
