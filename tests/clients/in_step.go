// Sends requests one after the other over a UNIX socket, with bodies of unknown length (which net/http sends in chunks),
// and checks that each response is the one to its request.
//
//	in_step SOCKET COUNT
//
// Prints the number of connections that it took. Fails at the first response that belongs to another request.
package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

var connections int32

// unknownLength hides the length of a text: io.Pipe hands it over in two pieces.
func unknownLength(text string) io.Reader {
	reader, writer := io.Pipe()
	go func() {
		middle := len(text) / 2
		io.WriteString(writer, text[:middle])
		io.WriteString(writer, text[middle:])
		writer.Close()
	}()
	return reader
}

type exchange struct {
	method, path, body string
	status             int
	contains           string
}

// wanted returns the request with this number and what its response, and no other, has.
func wanted(number int) exchange {
	size := strconv.Itoa(64 + number)
	field := fmt.Sprintf("field_%d", number)
	switch number % 5 {
	case 0:
		return exchange{"PATCH", "/machine-config", `{"mem_size_mib": ` + size + `}`, 204, ""}
	case 1:
		before := strconv.Itoa(64 + number - 1)
		return exchange{"GET", "/machine-config", "", 200, `"mem_size_mib":` + before + `,`}
	case 2:
		return exchange{"PUT", "/actions", `{"` + field + `": 1}`, 400, "unknown field `" + field + "`"}
	case 3:
		return exchange{"GET", "/" + field, "", 400, field}
	}
	large := `{"` + field + `": "` + strings.Repeat("x", 40000) + `"}`
	return exchange{"PUT", "/logger", large, 400, "unknown field `" + field + "`"}
}

func send(client *http.Client, number int) error {
	want := wanted(number)
	var body io.Reader
	if want.body != "" {
		body = unknownLength(want.body)
	}
	request, err := http.NewRequest(want.method, "http://localhost"+want.path, body)
	if err != nil {
		return err
	}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		return err
	}
	if response.StatusCode != want.status || !strings.Contains(string(text), want.contains) {
		return fmt.Errorf("%s %s was answered %d %s", want.method, want.path, response.StatusCode, text)
	}
	return nil
}

func main() {
	socket := os.Args[1]
	count, err := strconv.Atoi(os.Args[2])
	if err != nil {
		panic(err)
	}
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		atomic.AddInt32(&connections, 1)
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}
	client := &http.Client{Transport: &http.Transport{DialContext: dial}, Timeout: 60 * time.Second}
	for number := 0; number < count; number++ {
		if err := send(client, number); err != nil {
			fmt.Fprintf(os.Stderr, "request %d: %v\n", number, err)
			os.Exit(1)
		}
	}
	fmt.Println(atomic.LoadInt32(&connections))
}
